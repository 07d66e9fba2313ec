import react from "@vitejs/plugin-react";
import { defineConfig } from "vitest/config";

// The tests need a real relay: tests/web/test_client.py starts it and sets RELAY_URL.
export default defineConfig({ plugins: [react()], test: { include: ["test/*.test.js"], testTimeout: 20_000, fileParallelism: false } });
