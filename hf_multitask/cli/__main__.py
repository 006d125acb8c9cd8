"""`python -m hf_multitask.cli`, for launchers that start modules."""

from . import main

if __name__ == "__main__":
    main()
