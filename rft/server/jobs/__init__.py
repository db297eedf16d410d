"""Fine-tuning jobs as the wire has them: what may be asked, what it comes to, what is shown. Runs nothing."""
