"""Run the demo on the embedded model: `python examples/quickstart.py`. No download, a CPU is enough.

For a model of your own it comes down to

    import dynaexq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype="auto")
    runtime = dynaexq.patch(model, hbm_budget="20GiB")
    model.generate(**inputs)
    print(runtime.report())
"""

from dynaexq.cli.demo import run

if __name__ == "__main__":
    run()
