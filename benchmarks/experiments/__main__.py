"""All experiments: `python benchmarks/experiments [NAME ...] [--quick] [--render]`."""

import lab

if __name__ == "__main__":
    lab.main(*lab.everything())
