"""Files as others leave them: read with limits and checked against a form, written so that a half
never looks whole.
"""
