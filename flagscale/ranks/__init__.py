"""Ranks: a step's processes, on this machine under torchrun, or as a TrainJob.

Both ways speak one protocol: a folder with the request, a folder a rank, and the result
(`rank_folder`); `launch` is a rank's whole life, and starts ranks on this machine.
"""
