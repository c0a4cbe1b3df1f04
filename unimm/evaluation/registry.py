"""The benchmarks by name; imports nothing, so that a list of them costs nothing."""

# name -> the module and its class
BENCHMARKS = {
    "shapes": "unimm.evaluation.benchmarks.shapes:ShapesBenchmark",
    "unisandbox": "unimm.evaluation.benchmarks.unisandbox.benchmark:UniSandBoxBenchmark",
}
