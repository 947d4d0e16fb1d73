"""Cases and results that travel: to programs without Python and back, and verdicts on what others
computed.
"""
