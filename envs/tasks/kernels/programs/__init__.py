"""The programs that judge kernels, and what compiles and starts them: texts that a grader's `source` joins."""
