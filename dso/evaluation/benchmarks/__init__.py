"""Published benchmarks of bias and of capability, scored as published, with intervals and paired differences."""
