"""A run as something to read: JSON, JUnit XML, an HTML page, the support matrix, documents of ops.
Nothing here judges.
"""
