"""Routing traces: what was routed where, window by window; written, read, made up. It knows no model and no rule."""

from dynaexq.traces.synthetic import WORKLOADS, Workload, generate
from dynaexq.traces.trace_file import Phase, Trace, TraceHeader, TraceWindow, TraceWriter

__all__ = ["WORKLOADS", "Phase", "Trace", "TraceHeader", "TraceWindow", "TraceWriter", "Workload", "generate"]
