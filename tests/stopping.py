"""What test_stops.py starts and stops: a short run on image files that a worker decodes, one update in a tenth of a second.

python tests/stopping.py METHOD ARGUMENTS..., which are those of wejepa.train.pretrain; or torchrun in place of python
"""

import multiprocessing
import os
import sys
import time

METHOD, *ARGUMENTS = sys.argv[1:] if __name__ == "__main__" else ("",)

if __name__ == "__main__":
    multiprocessing.set_start_method(METHOD)
    from wejepa.train.loop import Pretraining
    from wejepa.train.pretrain import main

    def slowly(self, images, step=Pretraining.train_step):
        value = step(self, images)
        time.sleep(0.1)
        return value

    Pretraining.train_step = slowly
    code = main(ARGUMENTS)
    print(f"rank {os.environ.get('RANK', 0)} ends with {code}", flush=True)
    if "RANK" in os.environ:
        os._exit(code)  # as wejepa.train.pretrain ends under torchrun
    sys.exit(code)
