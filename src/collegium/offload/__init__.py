"""More model than memory: experts on a disk, some of them in a bounded memory, and what decides which."""
