// Read by test_ui_browser.py and run inside the page: what a person with a screen reader or poor sight would meet.
({
  /** Controls without a name, images without a text, headings that skip a level, ids that are there twice. */
  problems() {
    const found = [];
    const shown = (element) => element.checkVisibility({ visibilityProperty: true });
    for (const control of document.querySelectorAll("input, select, textarea")) {
      const named =
        control.labels?.length || control.getAttribute("aria-label") || control.getAttribute("aria-labelledby");
      if (shown(control) && !named) found.push(`no label: ${control.outerHTML.slice(0, 120)}`);
    }
    for (const button of document.querySelectorAll("button, a[href], [role=tab]")) {
      if (shown(button) && !(button.textContent.trim() || button.getAttribute("aria-label")))
        found.push(`no name: ${button.outerHTML.slice(0, 120)}`);
    }
    for (const image of document.querySelectorAll("img, [role=img]")) {
      if (!image.alt && !image.getAttribute("aria-label") && !image.getAttribute("aria-labelledby"))
        found.push(`no text: ${image.outerHTML.slice(0, 120)}`);
    }
    const levels = [...document.querySelectorAll("main h1, main h2, main h3, main h4, main h5")]
      .filter(shown)
      .map((heading) => Number(heading.tagName[1]));
    if (levels.filter((level) => level === 1).length !== 1) found.push("there is not one h1");
    levels.forEach((level, at) => {
      if (at && level > levels[at - 1] + 1) found.push(`h${levels[at - 1]} is followed by h${level}`);
    });
    const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
    const twice = ids.filter((id, at) => id && ids.indexOf(id) !== at && !document.getElementById(id).closest("svg"));
    if (twice.length) found.push(`ids that are there twice: ${twice}`);
    if (document.querySelectorAll("main").length !== 1) found.push("there is not one main");
    return found;
  },

  /** Texts whose colour differs too little from what is behind them. */
  faint() {
    const parse = (color) => {
      const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
      return { r, g, b, a };
    };
    const over = (top, below) => ({
      r: top.r * top.a + below.r * (1 - top.a),
      g: top.g * top.a + below.g * (1 - top.a),
      b: top.b * top.a + below.b * (1 - top.a),
      a: 1,
    });
    const luminance = ({ r, g, b }) => {
      const [x, y, z] = [r, g, b].map((value) =>
        value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4,
      );
      return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (element) => {
      const layers = [];
      for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
      return layers.reverse().reduce((below, layer) => over(layer, below), { r: 255, g: 255, b: 255, a: 1 });
    };
    const found = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (
        !walker.currentNode.data.trim() ||
        element.closest("svg, script, option, [disabled], [aria-disabled=true], .sr") ||
        !element.checkVisibility({ visibilityProperty: true })
      )
        continue;
      const back = behind(element);
      const front = over(parse(getComputedStyle(element).color), back);
      const [light, dark] = [luminance(front), luminance(back)].sort((a, b) => b - a);
      const ratio = (light + 0.05) / (dark + 0.05);
      if (ratio < 4.5)
        found.set(
          `${element.tagName}.${element.className}`,
          `${ratio.toFixed(2)} ${walker.currentNode.data.trim().slice(0, 40)}`,
        );
    }
    return [...found].map(([name, what]) => `${name}: ${what}`);
  },
});
