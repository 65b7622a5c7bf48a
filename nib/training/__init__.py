"""What train.py's loop calls: the run, how it is saved, optimizers, schedule, processes, validation, reports.

Start with settings.py and run.py. optimizer.py has Muon, distributed.py the communication between processes.
"""
