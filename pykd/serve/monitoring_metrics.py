"""What is watched of the models, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pykd.serve.monitoring import Monitoring


class MonitoringMetrics(Collector):
    """The state of a service's monitoring, as it is when it is asked for."""

    def __init__(self, monitoring: Monitoring) -> None:
        self._monitoring = monitoring

    def collect(self) -> Iterator[Metric]:
        """One gauge a kind; quality only of models with labels."""
        state = self._monitoring.state()
        psi = GaugeMetricFamily("pykd_drift_psi", "Population stability index.", labels=["model", "quantity"])
        ks = GaugeMetricFamily("pykd_drift_ks", "Kolmogorov-Smirnov distance.", labels=["model", "quantity"])
        alarms = GaugeMetricFamily("pykd_alarms", "Quantities beyond their thresholds.", labels=["model"])
        accuracy = GaugeMetricFamily("pykd_rolling_accuracy", "Over the newest true labels.", labels=["model"])
        f1 = GaugeMetricFamily("pykd_rolling_f1", "Macro F1 over the newest true labels.", labels=["model"])
        labels = GaugeMetricFamily("pykd_rolling_labels", "True labels in the window.", labels=["model"])
        for name, model in state["models"].items():
            for drift in model["drift"]:
                psi.add_metric([name, drift["quantity"]], drift["psi"])
                if drift["ks"] is not None:
                    ks.add_metric([name, drift["quantity"]], drift["ks"])
            alarms.add_metric([name], len(model["alarms"]))
            labels.add_metric([name], model["quality"]["labels"])
            for gauge, value in ((accuracy, model["quality"]["accuracy"]), (f1, model["quality"]["f1"])):
                if value is not None:
                    gauge.add_metric([name], value)
        unwatched = CounterMetricFamily("pykd_unwatched_predictions", "Not watched: too many waited.")
        unwatched.add_metric([], state["unwatched"])
        yield from (psi, ks, alarms, accuracy, f1, labels, unwatched)
