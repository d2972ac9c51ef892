"""A store in a web application: `asyncstore.integrations.fastapi` and `.aiohttp`.

Each imports its framework, and is imported by whoever uses it, never by asyncstore itself.
"""
