"""What stands before the app, as ASGI middlewares: hosts, origins, keys and bodies; knows no routes' meaning.

`guarded(app, …)` puts them in order. Each one answers what it refuses itself, in OpenAI's shape.
"""
