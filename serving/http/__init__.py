"""HTTP: who may come in, OpenAI's API and the native one."""
