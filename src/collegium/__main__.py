"""``python -m collegium``, for launchers such as torchrun that start modules."""

from collegium.cli.main import main

if __name__ == "__main__":
    main()
