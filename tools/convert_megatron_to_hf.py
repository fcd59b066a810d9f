"""One checkpoint step folder to a HuggingFace folder; see roll_sft/convert/to_hf.py.

python tools/convert_megatron_to_hf.py --checkpoint outputs/RUN/checkpoints/step_N --output FOLDER
"""

import sys

from roll_sft.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
