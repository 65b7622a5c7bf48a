"""What train.py's loop calls: settings, the run, its saving and state, optimizers, schedule, processes, validation, reports.

Start with settings.py and run.py; optimizer.py has Muon, distributed.py what several processes agree on.
"""
