"""Routing traces: what was routed where, window by window; written, read, made up. It knows no model and no rule."""

from dynaexq.traces.format import Phase, Trace, TraceHeader, TraceWriter, Window
from dynaexq.traces.generator import WORKLOADS, Workload, generate

__all__ = ["WORKLOADS", "Phase", "Trace", "TraceHeader", "TraceWriter", "Window", "Workload", "generate"]
