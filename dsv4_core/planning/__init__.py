"""The graph run on shapes: what a machine would read, multiply, store and send. Nothing here
touches a weight's value.
"""
