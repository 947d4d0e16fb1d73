"""Stable for plug-ins: codecs of the small dtypes, for backends that compute on the host and for
tests of those that do not.
"""

from dsv4_core.contract.dtypes import *  # noqa: F403  a plug-in may use every public name of it
