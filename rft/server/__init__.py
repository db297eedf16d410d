"""The OpenAI-compatible server: the hosted fine-tuning API, spoken by runs on this machine."""
