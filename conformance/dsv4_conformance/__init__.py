"""The conformance suite: whether a backend computes DeepSeek-V4, how close to the edge each result is, and what to fix.

Module map, in the order in which a run meets it:

- ``cli``: ``dsv4 conformance run | mutants | matrix | export | judge | localise``.
- ``checks``: what can be checked, as a list of ``Check`` (id, op or law, tier, level, ``run(session) -> Finding``); ``collect`` gathers op
  cases, recorded traces, laws and model-level checks. ``session``: a backend, its oracle and its claims.
- ``opcases``: an op's declared cases as checks. ``calls``: one call of an op, its operands and seed, and the run of it on a backend.
- ``flavours`` and ``operands``: how operands are filled. ``guard``: poison around every buffer.
- ``budget``: what error the contract allows each element (oracle, sensitivity, the one safety factor). ``judge``: exact and rounded
  results, shapes, dtypes, aliasing; ``discrete``: picks, by margin. ``metrics``: figures reported with a verdict.
- ``traces``: recorded traces as op cases. ``golden``: the recorded vectors themselves (``data/``).
- ``laws``, ``models``: chunking, causality, rewind ...; the recorded models, the native-mode distance.
- ``runner``: order, claims, xfails, isolation (``isolate``), exit status. ``report``: JSON, JUnit XML, HTML, support matrix.
- ``museum``: wrong backends that must be caught, and honest variants that must not.
- ``export`` and ``localise``: cases for programs without Python; the first op at which two backends part.
"""
