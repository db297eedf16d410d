"""What a run needs of a machine, before any machine is asked: memory, a split of the GPUs, speed, what limits it.

Pure arithmetic on a config and a model's config.json: loads no weights, no torch, no transformers. Every formula says
where it comes from; scripts/bench_plan holds it to measured memory and time.
"""
