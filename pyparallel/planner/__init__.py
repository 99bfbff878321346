"""Which strategies a model, a cluster and a workload want: memory, time, and the reasons.

Nothing here touches a device, holds a weight or starts a rank. Sizes are bytes, times seconds, rates
bytes or FLOPs a second; shapes and hardware are data files (``data/``) with their sources.
"""
