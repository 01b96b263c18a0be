"""``python -m aemim_algorithm`` is the command ``aemim``."""

from aemim_algorithm.cli import main

if __name__ == "__main__":
    main()
