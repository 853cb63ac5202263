"""python tests/extracting.py PHOTOS CACHE CALL: extract the features of a folder.

From the backbone's call number CALL on it prints "reached" and waits for a line. At the end it prints the number of
calls and a digest of the features.
"""

import hashlib
import json
import sys

from test_store import SLIDE, FakeBackbone, extract, small

from smooseg_fast.features import extract as extracting


class Waiting(FakeBackbone):
    def __call__(self, images):
        if self.calls + 1 == int(sys.argv[3]):
            print("reached", flush=True)
            sys.stdin.readline()
        return super().__call__(images)


if __name__ == "__main__":
    small()
    extracting.WAIT_S = 0.02
    backbone = Waiting()
    features = extract(sys.argv[1], sys.argv[2], backbone, **SLIDE)
    print(json.dumps([backbone.calls, hashlib.sha256(features.load().numpy().tobytes()).hexdigest()]))
