import { fileURLToPath } from "node:url";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// `npm run dev` in this folder beside `make run` in the project: /api/ is proxied to the relay, so that
// page and relay share an origin. REACT=18 builds the app with React 18.
const packages = fileURLToPath(new URL("../../node_modules/", import.meta.url));
const eighteen = process.env.REACT === "18" ? { "react-dom": `${packages}react-dom-18`, react: `${packages}react-18` } : {};

export default defineConfig({
  plugins: [react()],
  // In this folder four files are links into web/; in your own app they are copies.
  resolve: { preserveSymlinks: true, alias: eighteen },
  server: { proxy: { "/api": { target: process.env.RELAY_URL ?? "http://127.0.0.1:8787", ws: true } } },
});
