"""Runs the unittest cases of a script and prints the Test Anything Protocol, which meson and other runners read."""
import signal
import sys
import unittest


class TapResult(unittest.TestResult):
    def __init__(self):
        super().__init__()
        self.printed = 0

    def line(self, ok, test, note=""):
        self.printed += 1
        name = test.id().replace("__main__.", "").replace("#", "")
        print(f"{'ok' if ok else 'not ok'} {self.printed} - {name}{note}", flush=True)

    def broken(self, test, error):
        self.line(False, test)
        for line in self._exc_info_to_string(error, test).splitlines():
            print(f"# {line}", flush=True)

    def addSuccess(self, test):
        self.line(True, test)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.line(True, test, f" # SKIP {reason}")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.broken(test, error)

    def addError(self, test, error):
        super().addError(test, error)
        self.broken(test, error)

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.broken(subtest, error)


def skip_all(reason):
    print(f"1..0 # SKIP {reason}")
    sys.exit(0)


def main():
    """Runs every case of the calling script; names on the command line choose some of them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what the caller blocks programs would block, too
    loader = unittest.defaultTestLoader
    module = sys.modules["__main__"]
    suite = loader.loadTestsFromNames(sys.argv[1:], module) if sys.argv[1:] else loader.loadTestsFromModule(module)
    result = TapResult()
    suite.run(result)
    print(f"1..{result.printed}")
    sys.exit(0 if result.wasSuccessful() else 1)
