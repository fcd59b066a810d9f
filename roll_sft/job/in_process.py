"""A job prepared in the process that runs it, for the doors that do not start the stages."""

from roll_sft.config.schema import RunConfig
from roll_sft.job.job import Job
from roll_sft.job.prepare import prepare


def prepare_job(config: RunConfig) -> Job:
    """Prepare and plan `config`. Raises what `prepare` and `Job.of` raise."""
    return Job.of(prepare(config))
