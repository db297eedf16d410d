// What can be done to a run: pause, resume, cancel, each after a question.

import { post, runPath } from "./api.js";
import { confirmed } from "./dialogs.js";
import { h, plain } from "./dom.js";
import { say } from "./messages.js";

const WORDS = {
  pause: ["Pause", "It stops after its step and can go on later."],
  resume: ["Resume", "It goes on where it stopped."],
  cancel: ["Cancel", "It ends for good; what it has made so far stays."],
};

/** A button for each action; `onDone(run)` gets the run as it is afterwards, `onError(error)` what was refused. */
export function actionButtons(run, { onDone, onError, signal }) {
  return run.actions.map((action) => {
    const [label, what] = WORDS[action] ?? [action, ""];
    const name = `${label} ${plain(run.name)}`;
    const act = async (event) => {
      const button = event.currentTarget;
      const isDangerous = action === "cancel";
      const title = `${label} this run?`;
      if (!(await confirmed(title, `${plain(run.name)}: ${what}`, `${label} the run`, { isDangerous }))) return;
      button.disabled = true;
      try {
        const done = await post(runPath(run.id, action), {}, { signal });
        say(`${label}: asked for. It may take the rest of a step.`);
        onDone(done.run);
      } catch (error) {
        if (!signal.aborted) onError(error);
      }
      button.disabled = false;
    };
    const look = action === "cancel" ? "small-button danger-quiet" : "small-button";
    return h(
      "button",
      { type: "button", class: look, "aria-label": name, "data-key": `${action}-${run.id}`, onclick: act },
      label,
    );
  });
}
