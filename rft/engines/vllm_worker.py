"""What rft adds to the workers of a vLLM server that it launches (`--worker-extension-cls`). Runs in the server."""

from __future__ import annotations

from typing import Any


class HeadRefresh:
    """Mixed into vLLM's worker class; called through /collective_rpc."""

    model_runner: Any

    def refresh_heads(self) -> int:
        """Let output heads compute with the weights that were just reloaded; returns how many there are.

        vLLM 0.31 prepares an output head for a CPU by copying its weights into a layout of their own. A head that is
        tied to the embedding has no weights of its own in a checkpoint, so a reload leaves it out and the copy stays
        old. Without such a copy (on a GPU) this changes nothing.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        modules = self.model_runner.get_model().modules()
        heads = [part for part in modules if isinstance(part, VocabParallelEmbedding) and hasattr(part, "cpu_linear")]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)
