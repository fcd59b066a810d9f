"""A HuggingFace folder to one checkpoint step folder; see roll_sft/convert/from_hf.py.

python tools/convert_hf_to_megatron.py --model /models/Qwen2.5-7B --output FOLDER
"""

import sys

from roll_sft.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
