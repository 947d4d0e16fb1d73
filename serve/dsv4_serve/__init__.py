"""``dsv4 serve``: the engine behind the protocols of OpenAI and Anthropic. Needs the extra
``dsv4[serve]``.
"""
