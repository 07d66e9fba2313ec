import react from "@vitejs/plugin-react";
import { defineConfig } from "vitest/config";

// The tests talk to a real relay: tests/web/test_client.py starts it, and says where it is.
export default defineConfig({ plugins: [react()], test: { include: ["test/*.test.js"], testTimeout: 20_000, fileParallelism: false } });
