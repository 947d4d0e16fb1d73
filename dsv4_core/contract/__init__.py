"""What a backend promises: ops, dtypes, arrays, the ``Backend`` class and how it is found. Nothing
here knows the model.
"""
