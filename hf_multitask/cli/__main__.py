"""`python -m hf_multitask.cli`, for launchers that start modules."""

from .app import main

if __name__ == "__main__":
    main()
