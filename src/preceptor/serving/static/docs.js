/* global SwaggerUIBundle */
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger",
  validatorUrl: null, // the default asks a public server
  defaultModelsExpandDepth: -1,
});
