"""``python -m headrace_trainer.agent stage.json``."""

import sys

from headrace_trainer.agent.supervise import main

sys.exit(main(sys.argv[1:]))
