"""What the page reads: GET routes below /ui/api, one module per noun. They change nothing, and block no event loop."""

from __future__ import annotations

from fastapi import APIRouter

from rft.ui.routes import about, charts, doctor, rollouts, runs, traces

READING: tuple[APIRouter, ...] = (
    about.router,
    runs.router,
    charts.router,
    rollouts.router,
    traces.router,
    doctor.router,
)
