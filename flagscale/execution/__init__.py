"""How a step is a process, and its ranks are processes.

`step_process` is the whole of a step's process. `launch` is a rank's whole life, and starts ranks
on this machine under torchrun; `trainjob` starts them in pods of their own. Both ways speak one
protocol: a folder with the request, a folder a rank, and the result (`rank_folder`).
"""
