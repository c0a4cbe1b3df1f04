"""The benchmarks by name; imports nothing, so that a list of them costs nothing."""

# name -> the module and its class
BENCHMARKS = {
    "shapes": "unimm.evaluation.benchmarks.shapes:ShapesBenchmark",
    "unisandbox": "unimm.evaluation.benchmarks.unisandbox.benchmark:UniSandBoxBenchmark",
    "wise": "unimm.evaluation.benchmarks.wise:WiseBenchmark",
    "geneval": "unimm.evaluation.benchmarks.geneval.benchmark:GenEvalBenchmark",
    "imgedit": "unimm.evaluation.benchmarks.imgedit:ImgEditBenchmark",
}
