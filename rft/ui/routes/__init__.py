"""What is below /ui/api, one module per noun: what the page reads, and what it asks for."""

from __future__ import annotations

from fastapi import APIRouter

from rft.ui.routes import about, runs

READING: tuple[APIRouter, ...] = (about.router, runs.router)
