"""What train.py's loop calls: settings, the run and its state, optimizers, schedule, processes, validation, reports.

Start with settings.py and run.py. optimizer.py has Muon, distributed.py the communication between processes.
"""
