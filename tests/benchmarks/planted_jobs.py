"""Work for the tests of `runner.run_jobs`, in a module that imports nothing heavy: spawned processes import it."""

import time


def fail_or_wait(job, settings):
    """Fail, wait for ten minutes, or be done at once, as the label of the job says."""
    if job.label == "fails":
        raise RuntimeError("planted")
    if job.label == "long":
        time.sleep(600)
    return {"bits": 1.0, "nll": 1.0, "visual": 1.0, "text": 1.0}
