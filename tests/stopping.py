"""What test_stops.py starts and stops: a short run on image files that a worker decodes, slowly enough to be stopped.

python tests/stopping.py METHOD PAUSE ARGUMENTS...: how processes are started, seconds after each update, and what wejepa.train.pretrain
takes; or torchrun in place of python
"""

import multiprocessing
import os
import sys
import time

METHOD, PAUSE, *ARGUMENTS = sys.argv[1:] if __name__ == "__main__" else ("", "")

if __name__ == "__main__":
    multiprocessing.set_start_method(METHOD)
    from wejepa.train.loop import Pretraining
    from wejepa.train.pretrain import main

    def slowly(self, images, step=Pretraining.train_step):
        value = step(self, images)
        time.sleep(float(PAUSE))
        return value

    Pretraining.train_step = slowly
    code = main(ARGUMENTS)
    print(f"rank {os.environ.get('RANK', 0)} ends with {code}", flush=True)
    if "RANK" in os.environ:
        os._exit(code)  # as wejepa.train.pretrain ends under torchrun
    sys.exit(code)
