"""What proves a machine: checks of every piece of the fast path, what they found on this card, and `python -m fastpoem.doctor`.

It knows the engine, whose pieces it tries. Training asks it one thing (`trust.decide`): what may be trusted here.
"""
