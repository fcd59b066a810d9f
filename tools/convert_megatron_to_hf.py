"""One checkpoint step folder to a HuggingFace folder; see roll_sft/engine/export.py.

python tools/convert_megatron_to_hf.py --checkpoint outputs/RUN/checkpoints/step_N --output FOLDER
"""

import sys

from roll_sft.engine.convert import main

if __name__ == "__main__":
    sys.exit(main())
