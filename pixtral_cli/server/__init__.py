"""HTTP in, SSE out: the engine behind an OpenAI-compatible server."""
